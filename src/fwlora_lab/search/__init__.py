"""Hyper-parameter search with Optuna around training."""
