"""Training and prediction: trajectories, objective, predict, certify, tune."""
