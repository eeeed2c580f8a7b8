//! casemate: users, operators, offline verify.
