"""One HTML page that says what a result shows."""
