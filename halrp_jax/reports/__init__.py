"""Turns records into tables, figures and pages. Needs neither JAX nor the rest of the package."""
