"""A page to try a run's models in a browser, and the folder of it that can be pushed as a Space."""
