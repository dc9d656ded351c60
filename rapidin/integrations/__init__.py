"""Integrations into other libraries, each of which imports its library when it is imported itself."""
