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
