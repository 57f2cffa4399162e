"""What a run has to say, in words, columns, plots and pages; knows no terminal."""
