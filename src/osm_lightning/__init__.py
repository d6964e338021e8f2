"""Names whatever is inside a segmentation mask, with no vocabulary given."""

__version__ = "0.1.0"
