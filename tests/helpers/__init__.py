"""Code that tests share, with a file for each subject. No test imports another test, or a script that it runs."""
