"""Registration and dispatch, shared by every operation."""
