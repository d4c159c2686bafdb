"""What every room uses: errors, tensor paths, whole files, object stores."""
