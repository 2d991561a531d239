"""update_swa, update_csa, update_hca and normalize."""
