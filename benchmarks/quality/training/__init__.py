"""How the demo model was trained, stage by stage; `train_demo_vlm` runs them in order."""
