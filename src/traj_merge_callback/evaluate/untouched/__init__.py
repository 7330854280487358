"""An evaluation leaves no trace in training: whatever it may change is put back."""
