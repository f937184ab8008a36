//! GPT-2 on the fixtures.

mod common;
#[cfg(feature = "cuda")]
#[path = "../../../unladen/tests/common/fake_driver.rs"]
mod fake_driver;
mod forward;
#[cfg(feature = "cuda")]
mod gpu;
mod recognise;
