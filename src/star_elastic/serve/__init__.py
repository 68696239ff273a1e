"""Serving every size of a model from one copy of its weights."""
