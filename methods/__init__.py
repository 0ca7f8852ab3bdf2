"""The built-in methods, one file each. Listing them reads their ``CARD`` without importing."""
