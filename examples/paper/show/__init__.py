"""Results as tables and figures. Nothing is measured here, so changes do not invalidate any row."""
