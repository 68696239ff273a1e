"""What other engines need of a checkpoint: their formats, and plugins that read ours."""
