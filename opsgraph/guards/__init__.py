"""What callers, their functions and other libraries may give, change or take away."""
