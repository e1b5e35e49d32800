"""Whole score tables in, whole result tables out; no text, no figure, no profile."""
