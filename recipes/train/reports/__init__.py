"""What a complete run says of its weights and labels: files, figures, extreme examples."""
