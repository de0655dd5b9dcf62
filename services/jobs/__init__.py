"""Jobs and the local platform that runs them."""
