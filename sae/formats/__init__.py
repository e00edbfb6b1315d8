"""File formats, one module each. `saelens` is the native one."""
