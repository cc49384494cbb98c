"""What keeps generated parts of the documentation up to date."""
