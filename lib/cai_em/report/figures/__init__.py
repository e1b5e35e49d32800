"""Figures: each draws stored tables; a mark or an interval that is drawn stands in one of them."""
