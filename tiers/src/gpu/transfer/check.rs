//! Whether an order can be done at all, before anything of it is given to a device.
//!
//! Invariants: what passes touches nothing but its slots and its pages; a load whose bytes nobody has verified brings the checksums to do it with (law 1).
//! Leaves to others: whose slots they are, and that they stay so until the end (whoever orders).

use super::{Direction, ITEMS_MAX, Item, Order};
use crate::gpu::paged::Pages;
use kvd_proto::Error;
use kvd_proto::limits::PART_ALIGN;

/// Slots in HBM begin where a kernel can read them at its widest.
const KEPT_ALIGN_BYTES: u64 = 512;

/// What is wrong with the whole order.
pub(super) fn order(order: &Order, slot_bytes_max: u32) -> Result<(), Error> {
    order.pages.stripes(&order.layers)?;
    if order.items.len() > ITEMS_MAX {
        let what = format!("{} items", order.items.len());
        return Err(Error::limit("items", what, format!("order at most {ITEMS_MAX} at a time")));
    }
    let slot_bytes = order.pages.slot_bytes();
    if slot_bytes > slot_bytes_max {
        let what = format!("slots of {slot_bytes} bytes, and the staging area takes {slot_bytes_max}");
        return Err(Error::limit("pages", what, "give the device a larger staging area"));
    }
    match &order.fence {
        Some(fence) if fence.address == 0 || !fence.address.is_multiple_of(4) => {
            let what = format!("{:#x}", fence.address);
            Err(Error::invalid("fence.address", what, "give the address of a 32-bit number"))
        }
        Some(_) if order.direction == Direction::Store => {
            let fix = "wait for `PagesFree`: only loads have fences";
            Err(Error::invalid("fence", "a store with a fence", fix))
        }
        _ => Ok(()),
    }
}

/// What is wrong with one item of an order that passed `order`.
pub(super) fn item(order: &Order, item: &Item) -> Result<(), Error> {
    let pages = &order.pages;
    pages.check_rows(&item.rows)?;
    check_places(pages, item)?;
    match (&item.checksums, order.direction) {
        (Some(_), Direction::Store) => {
            let fix = "set `checksums_wanted`; the end says them";
            Err(Error::invalid("checksums", "a store with checksums", fix))
        }
        (Some(checksums), Direction::Load) => {
            let parts = pages.parts(order.layers.clone()).count();
            if checksums.len() == parts {
                return Ok(());
            }
            let what = format!("{} checksums of {parts} parts", checksums.len());
            Err(Error::invalid("checksums", what, "give one for each of the slice's parts in these layers"))
        }
        (None, Direction::Load) if item.host.is_some() => {
            let fix =
                "give the checksum of every part: bytes that pass no processor are verified on the device";
            Err(Error::invalid("checksums", "none for a load from pinned memory", fix))
        }
        (None, _) => Ok(()),
    }
}

fn check_places(pages: &Pages, item: &Item) -> Result<(), Error> {
    if item.host.is_none() && item.kept.is_none() {
        return Err(Error::invalid("host", "an item without a slot", "give a slot in DRAM, in HBM, or both"));
    }
    if let Some(host) = &item.host {
        let end = host.offset.checked_add(pages.slot_bytes() as usize);
        let fits = end.is_some_and(|end| end <= host.mapping.len());
        if !fits || !host.offset.is_multiple_of(PART_ALIGN as usize) {
            let what = format!(
                "a slot of {} bytes at {} of {}",
                pages.slot_bytes(),
                host.offset,
                host.mapping.len()
            );
            return Err(Error::invalid("host.offset", what, "give a slot within its mapping"));
        }
    }
    if let Some(kept) = item.kept
        && (kept == 0
            || !kept.is_multiple_of(KEPT_ALIGN_BYTES)
            || kept.checked_add(u64::from(pages.slot_bytes())).is_none())
    {
        let fix = format!("give the device's address of a slot, a multiple of {KEPT_ALIGN_BYTES}");
        return Err(Error::invalid("kept", format!("{kept:#x}"), fix));
    }
    Ok(())
}
