//! `unladen devices`: where weights can go on this machine.

mod bus;

use crate::{args::DevicesArgs, human, out};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use unladen::{
    Error, Result,
    cuda::{self, Gpus},
    memory,
};

#[derive(Serialize)]
struct Listing {
    devices: Vec<Listed>,
    /// The newest CUDA that the driver speaks; `null`: no driver, or one that does not work.
    cuda_version: Option<String>,
    /// The driver's own; `null`: that, or the system does not tell.
    driver_version: Option<String>,
}

#[derive(Serialize)]
struct Listed {
    /// As `--device` takes it.
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_bytes: Option<u64>,
    /// What can be had; `null`: the system does not tell.
    free_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compute_capability: Option<String>,
}

pub(crate) fn run(args: &DevicesArgs) -> Result<()> {
    if let Some(device) = args.measure_bus {
        return bus::run(device, args.bytes, args.json);
    }
    let gpus = cuda::gpus();
    let listing = listing(gpus.as_ref().ok());
    if args.json {
        out::result(&serde_json::to_string(&listing).expect("strings and numbers"));
    } else {
        print(&listing);
    }
    match gpus {
        Ok(Gpus { gpus, .. }) => {
            if gpus.is_empty() {
                out::words("note: there is an NVIDIA driver, but no GPU that this process may see");
            }
            gpus.iter().filter_map(|gpu| gpu.free_bytes.as_ref().err()).for_each(note);
            Ok(())
        }
        // A driver that is there and does not work is an error, none is not.
        Err(error) if cuda::has_driver() => Err(error),
        Err(error) => {
            note(&error);
            Ok(())
        }
    }
}

fn note(error: &Error) {
    out::words(&format!("note: {error}; {}", error.hint()));
}

fn listing(gpus: Option<&Gpus>) -> Listing {
    let host = Listed {
        device: "host".to_owned(),
        name: None,
        total_bytes: None,
        free_bytes: memory::available_bytes(),
        compute_capability: None,
    };
    let listed = gpus.iter().flat_map(|it| &it.gpus).map(|gpu| Listed {
        device: format!("cuda:{}", gpu.ordinal),
        name: Some(gpu.name.clone()),
        total_bytes: Some(gpu.total_bytes),
        free_bytes: gpu.free_bytes.as_ref().ok().copied(),
        compute_capability: Some(version(gpu.compute_capability)),
    });
    Listing {
        devices: [host].into_iter().chain(listed).collect(),
        cuda_version: gpus.map(|it| version(it.cuda_version)),
        driver_version: gpus.and_then(|it| it.driver_version.clone()),
    }
}

fn version((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

fn print(listing: &Listing) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["device", "name", "memory", "free", "compute capability"]);
    let bytes = |it: Option<u64>| it.map_or_else(String::new, human::bytes);
    for it in &listing.devices {
        table.add_row([
            it.device.clone(),
            it.name.as_deref().unwrap_or_default().escape_debug().to_string(),
            bytes(it.total_bytes),
            bytes(it.free_bytes),
            it.compute_capability.clone().unwrap_or_default(),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    out::result(&table.trim_fmt());
    if let Some(cuda) = &listing.cuda_version {
        let driver = listing.driver_version.as_ref().map(|it| format!("{it}, ")).unwrap_or_default();
        out::result(&format!("{:<12} {driver}CUDA {cuda}", "driver"));
    }
}
