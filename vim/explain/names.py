"""The names of explanations, apart from what draws them, so that `--help` does not wait for PyTorch."""

# The names that people know, and what grad-cam calls them.
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "elementwise": "GradCAMElementWise",
    "eigengradcam": "EigenGradCAM",
    "eigencam": "EigenCAM",
}
PIXEL_METHODS = ("saliency", "integrated_gradients", "smoothgrad")
EXPLANATIONS = ("attention", "rollout", *METHODS, *PIXEL_METHODS)
DEFAULT_EXPLANATIONS = ("attention", "rollout", "gradcam")

DENSE_EXPLANATIONS = ("attention", "rollout", *METHODS)
# Grad-CAM weighs a channel alike everywhere, so that for a box it would also light up other objects.
DEFAULT_DENSE_EXPLANATIONS = {"segmentation": ("attention", "gradcam"), "detection": ("attention", "hirescam")}
