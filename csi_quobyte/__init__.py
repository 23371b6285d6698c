"""A Kubernetes CSI driver that gives pods disks kept as image files on mounted Quobyte volumes."""

__version__ = "0.1.0"
