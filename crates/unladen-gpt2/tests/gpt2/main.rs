//! GPT-2 on the fixtures.

mod common;
mod forward;
mod recognise;
