//! The edge: TLS 1.3, routes by Host, mTLS to the guest.
