"""Commands that use a trained model: score, select, evaluate, weigh."""
