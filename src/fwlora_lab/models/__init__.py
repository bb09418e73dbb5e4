"""Pretrained encoders, their classifiers, their target matrices, and what a method adds to them."""
