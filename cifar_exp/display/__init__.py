"""Show one run to the user: terminal, live page, figures."""
