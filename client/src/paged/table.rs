//! A request's page table, read for one block.
//!
//! Owns from tokens to pages. Invariants: every page that comes out is one the engine has; spans are in the order of the block's tokens and do not overlap;
//! pages that lie one behind the other are one span. Leaves to others: where a page's bytes are (`transport::strided`).

use crate::transport::strided::Span;
use kvd_proto::Error;

/// A page table, and what it is read against.
#[derive(Debug, Clone, Copy)]
pub struct PageTable<'a> {
    /// Entry i: the page of tokens `i * page_tokens` on; negative: there is none.
    pub table: &'a [i32],
    /// Pages there are.
    pub pages: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// A page has one state, of its block's last token.
    pub last_only: bool,
    /// Rows go on from one page to the next page of memory.
    pub seamless: bool,
}

impl PageTable<'_> {
    /// Where the block's first `tokens` are, without those whose page is negative.
    pub fn spans(&self, block: u32, tokens: u32) -> Result<Vec<Span>, Error> {
        if tokens == 0 || tokens > self.block_tokens {
            let what = format!("{tokens} of a block of {}", self.block_tokens);
            return Err(Error::invalid("tokens", what, "give 1 to block_tokens"));
        }
        let first = u64::from(block) * u64::from(self.block_tokens);
        if self.last_only {
            let page = self.page(first + u64::from(tokens) - 1)?;
            return Ok(page
                .map(|page| Span { page, page_row: 0, block_row: 0, rows: 1 })
                .into_iter()
                .collect());
        }
        let mut spans = Vec::with_capacity(tokens.div_ceil(self.page_tokens) as usize);
        let mut row = 0;
        while row < tokens {
            let page_row = ((first + u64::from(row)) % u64::from(self.page_tokens)) as u32;
            let rows = (self.page_tokens - page_row).min(tokens - row);
            if let Some(page) = self.page(first + u64::from(row))? {
                self.push(&mut spans, Span { page, page_row, block_row: row, rows });
            }
            row += rows;
        }
        Ok(spans)
    }

    /// The page of a token; `None`: it is not wanted.
    fn page(&self, token: u64) -> Result<Option<u32>, Error> {
        let at = token / u64::from(self.page_tokens);
        let Some(page) = self.table.get(at as usize) else {
            let what = format!("{} pages, and token {token} is in the one at {at}", self.table.len());
            return Err(Error::invalid(
                "table",
                what,
                "give a page, or a negative number, for every token up to the block's end",
            ));
        };
        let Ok(page) = u32::try_from(*page) else { return Ok(None) };
        if page >= self.pages {
            let what = format!("page {page} at {at}, of {} pages", self.pages);
            return Err(Error::invalid("table", what, "give pages of the memory that was registered"));
        }
        Ok(Some(page))
    }

    fn push(&self, spans: &mut Vec<Span>, next: Span) {
        if let Some(last) = spans.last_mut().filter(|_| self.seamless) {
            let pages_of_last = (last.page_row + last.rows) / self.page_tokens;
            let goes_on =
                last.block_row + last.rows == next.block_row && last.page + pages_of_last == next.page;
            if goes_on {
                last.rows += next.rows;
                return;
            }
        }
        spans.push(next);
    }
}
