"""Detectors over plain backbones: ViTDet's pyramid, Mask R-CNN and Cascade Mask R-CNN."""

from vim.models.detection.cascade import CascadeRoIHeads
from vim.models.detection.detector import Detector, build_detector
from vim.models.detection.pyramid import SimpleFeaturePyramid

__all__ = ["CascadeRoIHeads", "Detector", "SimpleFeaturePyramid", "build_detector"]
