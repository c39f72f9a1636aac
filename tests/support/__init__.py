"""What several tests need: servers, generated images, toy models. Tests import from here, never from each other."""
