"""Patches, places of class tokens, resampling of position embeddings, rotary tables, norms."""

from __future__ import annotations

import pytest
import torch
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import nn

import vim
from tests.helpers import assert_close, load_golden
from vim.layers import GridRotary, LayerNorm, PatchEmbed, RMSNorm
from vim.layers.pos_embed import cls_indices, resample_pos_embed
from vim.layers.token_sequence import extract_tokens, insert_tokens


def test_patches_equal_timm_where_they_do_not_overlap():
    torch.manual_seed(0)
    ours, theirs = PatchEmbed((32, 48), 8, embed_dim=20), TimmPatchEmbed((32, 48), 8, embed_dim=20)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(ours(x), theirs(x))
    assert (ours.grid_size, ours.num_patches, ours.feat_ratio()) == (theirs.grid_size, theirs.num_patches, 8)


@pytest.mark.parametrize(("img_size", "stride", "grid"), [(224, 8, (27, 27)), ((26, 41), 5, (3, 6)), (16, 3, (1, 1))])
def test_grid_of_overlapping_patches(img_size, stride, grid):
    embed = PatchEmbed(img_size, 16, stride, embed_dim=4)
    assert embed.grid_size == grid
    assert embed(torch.zeros(1, 3, *embed.img_size)).shape == (1, grid[0] * grid[1], 4)


@pytest.mark.parametrize(
    ("size", "stride", "covered"), [(31, 8, (24, 24)), ((32, 33), 8, (32, 32)), ((30, 45), 5, (28, 43))]
)
def test_rows_and_columns_that_no_patch_covers_are_refused_unless_they_are_padded(size, stride, covered):
    words = rf"img_size must be covered by patches .* which cover \({covered[0]}, {covered[1]}\) of"
    with pytest.raises(ValueError, match=words):
        PatchEmbed(size, 8, stride)
    fits = 8 + 7 * stride
    embed = PatchEmbed(fits, 8, stride, in_chans=1, embed_dim=4, strict_img_size=False)
    sides = (size, size) if isinstance(size, int) else size
    with pytest.raises(ValueError, match=words):
        embed(torch.zeros(1, 1, *sides))
    with pytest.raises(ValueError, match=words):
        embed.set_input_size(size)
    assert embed.img_size == (fits, fits)
    padded = PatchEmbed(size, 8, stride, in_chans=1, embed_dim=4, dynamic_img_pad=True)
    image = torch.zeros(1, 1, *sides, requires_grad=True)
    padded(image).sum().backward()
    assert (image.grad != 0).all(), "every pixel enters the model"


@pytest.mark.parametrize(("size", "grid"), [((30, 17), (4, 3)), ((8, 8), (1, 1)), ((3, 33), (1, 5))])
def test_padding_until_patches_cover_the_image(size, grid):
    embed = PatchEmbed(32, 8, embed_dim=4, strict_img_size=False, dynamic_img_pad=True)
    assert embed.dynamic_feat_size(size) == grid
    assert embed(torch.zeros(1, 3, *size)).shape[1] == grid[0] * grid[1]


@pytest.mark.parametrize("shape", [(1, 3, 24, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="x must be"):
        PatchEmbed(32, 8)(torch.zeros(shape))


def test_resampled_filters_see_the_same_picture():
    torch.manual_seed(0)
    embed = PatchEmbed(32, 8, embed_dim=6)
    smooth = torch.linspace(0, 1, 32).expand(1, 3, 32, 32).contiguous()
    before = embed(smooth)
    embed.set_input_size(img_size=64, patch_size=16)
    assert (embed.patch_size, embed.stride, embed.grid_size) == ((16, 16), (16, 16), (4, 4))
    wide = torch.nn.functional.interpolate(smooth, scale_factor=2, mode="bilinear")
    assert_close(embed(wide), before, 0.05)


@pytest.mark.parametrize(
    ("position", "indices"), [("none", ()), ("head", (0,)), ("middle", (3,)), ("double", (0, 8)), ("random", (0,))]
)
def test_places_of_class_tokens(position, indices):
    assert cls_indices(position, 7) == indices


@pytest.mark.parametrize("name", ["pos_embed", "cls_token"])
@pytest.mark.parametrize("batched", [True, False], ids=["images", "tokens"])
def test_embeddings_that_are_broadcast_otherwise_reach_every_image_and_token(name, batched):
    """A prompt or a position embedding of its own for each image; one vector for all tokens."""
    model = vim.VisionMamba(img_size=16, patch_size=8, embed_dim=16, depth=1, num_classes=3).eval()
    tokens, images = (5 if name == "pos_embed" else 1), torch.randn(2, 3, 16, 16)
    shape = (2, tokens, 16) if batched else (1, 1, 16)
    setattr(model, name, nn.Parameter(torch.randn(shape)))
    plain = model(images)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    assert_close(plain, model(images), 1e-5)


@pytest.mark.parametrize("indices", [(), (0,), (3,), (7,), (0, 8), (2, 5)])
def test_insert_and_extract(indices):
    patches = torch.arange(7.0).reshape(1, 7, 1)
    tokens = [torch.full((1, 1, 1), 100.0 + i) for i in range(len(indices))]
    sequence = insert_tokens(patches, tokens, indices)
    assert [sequence[0, i, 0].item() for i in indices] == [100.0 + i for i in range(len(indices))]
    found, rest = extract_tokens(sequence, indices)
    assert torch.equal(rest, patches)
    assert all(torch.equal(a, b) for a, b in zip(found, tokens, strict=True))


@pytest.mark.parametrize("position", ["none", "head", "middle", "double"])
def test_resampling_keeps_class_tokens_out_of_the_picture(position):
    """A linear ramp over the grid stays a linear ramp, and the class tokens keep their values."""
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    grid = (rows + 100 * columns).reshape(1, 196, 1)
    tokens = [torch.full((1, 1, 1), -1e6)] * len(cls_indices(position, 196))
    sequence = insert_tokens(grid, tokens, cls_indices(position, 196))
    resampled = resample_pos_embed(sequence, (14, 14), (28, 21), position)
    found, ramp = extract_tokens(resampled, cls_indices(position, 28 * 21))
    assert all(t.item() == -1e6 for t in found)
    ramp = ramp.reshape(28, 21)
    inner = ramp[6:-6, 6:-6]
    assert_close(inner.diff(dim=0), torch.full_like(inner.diff(dim=0), 0.5), 0.2)
    assert_close(inner.diff(dim=1), torch.full_like(inner.diff(dim=1), 100 * 14 / 21), 0.2)


def test_resampling_to_the_same_grid_is_the_same_tensor():
    pos_embed = torch.randn(1, 197, 8)
    assert resample_pos_embed(pos_embed, (14, 14), (14, 14), "middle") is pos_embed


def test_rotary_tables_equal_the_released_ones():
    _, tensors = load_golden("models", "rope_clshead")
    rope = GridRotary(64, (4, 4))
    assert_close(rope.freqs_cos, tensors["override.rope.freqs_cos"], 1e-5)
    assert_close(rope.freqs_sin, tensors["override.rope.freqs_sin"], 1e-5)


def test_rotation_keeps_lengths_and_leaves_an_odd_first_token():
    rope, tokens = GridRotary(8, (2, 3)), torch.randn(2, 7, 8)
    turned = rope(tokens)
    assert torch.equal(turned[:, 0], tokens[:, 0])
    assert torch.equal(turned[:, 1], tokens[:, 1]), "row 0, column 0: angle 0"
    assert not torch.allclose(turned[:, 2:], tokens[:, 2:])
    assert_close(turned.norm(dim=-1), tokens.norm(dim=-1), 1e-6)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_hand_the_residual_on_in_float32(norm, dtype):
    layer = norm(16).to(dtype)
    x, residual = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 5, 16)
    y, r = layer(x, residual)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (y.dtype, r.dtype) == (dtype, wide)
    assert torch.equal(r, x.to(wide) + residual)
    torch_norm = torch.nn.RMSNorm(16, eps=1e-5) if norm is RMSNorm else torch.nn.LayerNorm(16)
    assert_close(y, torch_norm.to(wide)(r), 5e-3 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(layer(x)[1], x.to(wide))
