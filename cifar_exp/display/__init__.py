"""What a person sees of one run: terminal, live page, figures."""
