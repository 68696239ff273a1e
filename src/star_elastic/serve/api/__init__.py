"""The wire: routes, replies, errors."""
