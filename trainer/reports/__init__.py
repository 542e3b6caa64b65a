"""What reports: documents, plots and tables, made of result files alone. Nothing here imports torch."""
