"""The built-in suites (one TOML file a table or figure) and the published numbers."""
