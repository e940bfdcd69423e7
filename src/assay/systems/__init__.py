"""What is measured; every folder is a library that is useful without the bench."""
