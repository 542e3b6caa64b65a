"""Reports: documents, plots and tables made from result files alone. Nothing here imports torch."""
