"""Vision Mamba (Vim) in one file of plain PyTorch, to read next to the paper.

    Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    arXiv:2401.09417. The recurrence is Algorithm 2 of Gu and Dao 2023, "Mamba", arXiv:2312.00752.

The class token is in the middle: this model loads the released checkpoints of Vim-Ti, Vim-S and Vim-B, and equals the
library's `vim_tiny_patch16_224` and its larger variants. Everything is written out and nothing is fast: the recurrence
is a loop over tokens.

    python examples/minimal_vim.py CHECKPOINT IMAGE        classify an image with a released checkpoint of Vim-Ti

Glossary of shapes, named as in the paper, with the sizes of Vim-Ti at 224 x 224 pixels:

    B      batch      images
    M      seqlen     tokens: 14 x 14 patches and the class token, 197
    D      dim        width of a token, 192
    E      inner      width inside a mixer, 2 D = 384
    N      d_state    numbers in the state of each channel, 16
    R      dt_rank    rank of the step size's projection, D / 16 = 12

Glossary of tensors. B and D have two meanings in the papers, and here: a shape, and a tensor.

    T      (B, M, D)     tokens between blocks, the residual stream; float32 always
    x, z   (B, M, E)     halves of in_proj's output: the input of both directions, and their gate
    u      (B, M, E)     x after the causal convolution and SiLU; the paper's x'
    delta  (B, M, E)     step size, positive: how much of a token is written, and how much of the state decays
    A      (E, N)        decay rates, negative; the checkpoint holds A_log, with A = -exp(A_log)
    B      (B, M, N)     input map: which numbers of the state a token writes
    C      (B, M, N)     output map: which numbers of the state a token reads
    D      (E,)          skip connection around the recurrence
    h      (B, E, N)     the state, float32 always
    ..._b                weights and results of the backward direction, which starts at the last token
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run the recurrence over the tokens in their order; all shapes as in the glossary, result (B, M, E).

        h[i] = exp(delta[i] A) h[i-1] + delta[i] B[i] u[i]
        y[i] = C[i] h[i] + D u[i]

    The decay is the zero-order hold of the continuous system h' = A h + B u; B is discretised by Euler's rule. Both
    depend on the token through delta, which makes the scan selective: a large delta forgets the past and writes the
    token, a small one skips it.
    """
    A_bar = torch.exp(delta[..., None] * A)  # (B, M, E, N)
    Bu_bar = (delta * u)[..., None] * B[:, :, None, :]  # (B, M, E, N)
    h = torch.zeros_like(A_bar[:, 0])  # (B, E, N)
    outputs = []
    for i in range(u.shape[1]):
        h = A_bar[:, i] * h + Bu_bar[:, i]
        outputs.append((h * C[:, i, None, :]).sum(-1))  # (B, E)
    return torch.stack(outputs, dim=1) + D * u


class Mixer(nn.Module):
    """The mixer of Algorithm 1: a convolution and a scan from each end of the sequence, gated and averaged."""

    def __init__(self, dim: int, d_state: int = 16, d_conv: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, self.d_state, self.dt_rank = expand * dim, d_state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)  # Linear^x and Linear^z
        for o in ("", "_b"):  # each direction has weights of its own
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)  # depthwise
            self.add_module(f"conv1d{o}", conv)
            # Linear^Delta, Linear^B and Linear^C in one product; Linear^Delta has a low rank, R.
            self.add_module(f"x_proj{o}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{o}", nn.Linear(self.dt_rank, inner))  # its bias is Parameter^Delta
            A = torch.arange(1.0, d_state + 1).expand(inner, d_state)
            self.register_parameter(f"A{o}_log", nn.Parameter(A.log()))  # Parameter^A
            self.register_parameter(f"D{o}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, dim, bias=False)  # Linear^T

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix normalised tokens, (B, M, D) -> (B, M, D)."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (B, M, E) each
        y = self.scan(x, "")
        # A scan from the last token is a scan of the flipped sequence.
        y_b = self.scan(x.flip(1), "_b").flip(1)
        # The paper adds the directions; the released models take their mean.
        return self.out_proj((y + y_b) / 2 * F.silu(z))

    def scan(self, x: Tensor, o: str) -> Tensor:
        """Run the body of the loop "for o in {forward, backward}", (B, M, E) -> (B, M, E)."""
        names = (f"conv1d{o}", f"x_proj{o}", f"dt_proj{o}", f"A{o}_log", f"D{o}")
        conv1d, x_proj, dt_proj, A_log, D = (getattr(self, name) for name in names)
        # x'_o = SiLU(Conv1d_o(x)). The padding before the first token makes it causal; the outputs past the last go.
        u = F.silu(conv1d(x.mT)[..., : x.shape[1]].mT)
        # B_o = Linear^B_o(x'_o), C_o = Linear^C_o(x'_o)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        # Delta_o = log(1 + exp(Linear^Delta_o(x'_o) + Parameter^Delta_o))
        delta = F.softplus(dt_proj(dt).float())
        return selective_scan(u.float(), delta, -torch.exp(A_log.float()), B.float(), C.float(), D.float()).to(u.dtype)


class Block(nn.Module):
    """Algorithm 1: T_l = T_{l-1} + Mixer(Norm(T_{l-1})). There is no MLP."""

    def __init__(self, dim: int, **mixer: int) -> None:
        super().__init__()
        self.mixer = Mixer(dim, **mixer)
        self.norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return T_l from T_{l-1}, (B, M, D) each, in float32."""
        return tokens + self.mixer(self.norm(tokens))


class Vim(nn.Module):
    """Patches, a class token in the middle, position embedding, blocks, norm, head (section 3 of the paper).

    Args:
        img_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        stride: Pixels from one patch to the next; `None` is the side of a patch. The fine-tuned models have 8.
        dim: D; 192, 384 and 768 are Vim-Ti, Vim-S and Vim-B.
        depth: Number of blocks.
        num_classes: Outputs of the head.
        mixer: Other arguments of `Mixer`.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        stride: int | None = None,
        dim: int = 192,
        depth: int = 24,
        num_classes: int = 1000,
        **mixer: int,
    ) -> None:
        super().__init__()
        stride = stride or patch_size
        num_patches = ((img_size - patch_size) // stride + 1) ** 2
        self.middle = num_patches // 2  # place of the class token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, stride)})
        self.layers = nn.ModuleList(Block(dim, **mixer) for _ in range(depth))
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images, (B, 3, height, width) -> logits (B, num_classes)."""
        patches = self.patch_embed["proj"](images).flatten(2).mT  # (B, M - 1, D), row by row
        cls = self.cls_token.expand(len(images), -1, -1)
        # T_0 = [t_1 W; ...; t_cls; ...; t_J W] + E_pos
        tokens = torch.cat([patches[:, : self.middle], cls, patches[:, self.middle :]], dim=1) + self.pos_embed
        tokens = tokens.float()  # whatever the blocks compute in, their sum stays in float32
        for block in self.layers:
            tokens = block(tokens)
        return self.head(self.norm_f(tokens)[:, self.middle])  # f = Norm(T_L[cls]), p = MLP(f)


def main() -> None:
    """Print the five most probable ImageNet classes of an image, by number."""
    import numpy as np
    from PIL import Image

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", help="released checkpoint of Vim-Ti, such as vim_t_midclstok_76p1acc.pth")
    parser.add_argument("image")
    args = parser.parse_args()
    with torch.serialization.safe_globals([argparse.Namespace]):  # checkpoints may hold the arguments of their run
        checkpoint = torch.load(args.checkpoint, map_location="cpu")
    model = Vim().eval()
    model.load_state_dict(checkpoint.get("model", checkpoint))
    # Preprocessing at evaluation: shorter side to 256 pixels, centre crop of 224, ImageNet's mean and deviation.
    image = Image.open(args.image).convert("RGB")
    scale = 256 / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - 224) // 2, (height - 224) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy(np.array(image)).float() / 255
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        probabilities = model(pixels.permute(2, 0, 1)[None]).softmax(-1)[0]
    for probability, number in zip(*(t.tolist() for t in probabilities.topk(5)), strict=True):
        print(f"{probability:6.1%}  class {number}")


if __name__ == "__main__":
    main()
