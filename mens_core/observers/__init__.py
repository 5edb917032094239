"""What shows a run elsewhere: TensorBoard, Weights & Biases, MLflow. One is at work only where ``--report-to`` asks."""
