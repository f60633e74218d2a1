"""The commands of `variform`, one file each: `add_NAME` registers its parser, `run_NAME` imports its tools and runs."""
