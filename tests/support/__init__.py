"""What several rooms' tests share and no fixture can hold."""
