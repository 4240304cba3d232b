"""Code that all ops share: argument checks, memory layout, registration with torch."""
