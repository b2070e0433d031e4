"""Live charts of a training run that can be paused, steered and rewound."""
