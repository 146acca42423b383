"""What the tests share, a subject a file. No test imports another test, or a script that it runs."""
