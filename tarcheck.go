package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	imageChunk      = 256 << 10 // bytes of an upload that are read or sent at a time
	maxHeaders      = 4 << 20   // bytes of headers before an entry; archive/tar reads 1 MiB of each at most
	maxImageEntries = 1_000_000
	maxPadding      = 1 << 20 // bytes after an archive's end marker; tar fills up to 10 KiB
)

// compressionMagic lists the magic numbers of gzip, bzip2, xz, zstd and lz4. The engine decompresses anything
// that starts with one, even a tar archive whose first file name does.
var compressionMagic = []string{
	"\x1f\x8b", "BZh", "\xfd7zXZ", "\x28\xb5\x2f\xfd", "\x04\x22\x4d\x18", "\x02\x21\x4c\x18"}

// skippableFrameMagic is bytes 1 to 3 of a skippable frame of zstd or lz4.
const skippableFrameMagic = "\x2a\x4d\x18"

// checkTar reads r to its end and returns nil if it is one complete tar archive of a root file system: with
// at least one entry, with the end marker, and without anything that tar programs read differently. The
// engine takes a truncated archive for a smaller one, and an empty body for an empty image.
func checkTar(r io.Reader) error {
	in := bufio.NewReaderSize(r, imageChunk)
	start, err := in.Peek(8)
	if err != nil && err != io.EOF {
		return err
	}
	isCompressed := func(magic string) bool { return strings.HasPrefix(string(start), magic) }
	if slices.ContainsFunc(compressionMagic, isCompressed) ||
		len(start) > 4 && string(start[1:4]) == skippableFrameMagic {
		return newAPIError(kindArchiveRefused, "the body is compressed: it must be a plain tar archive")
	}
	check := &tarCheck{in: in}
	check.archive = tar.NewReader(check)
	for {
		header, err := check.next()
		if err == io.EOF {
			return check.end()
		}
		if err != nil {
			return tarError(err)
		}
		if err := check.entry(header); err != nil {
			return newAPIError(kindArchiveRefused, "entry %q: %v", header.Name, err)
		}
	}
}

// tarError returns the 400 for an archive that cannot be read, or err itself if that is more specific.
func tarError(err error) error {
	isDisk := isType[syscall.Errno](err) // from writing the upload to its file
	if err == nil || isDisk || isType[*http.MaxBytesError](err) || isType[*apiError](err) {
		return err
	}
	return newAPIError(kindArchiveRefused, "the body is not a whole tar archive: %s", rootCause(err))
}

// tarCheck reads an archive with archive/tar, as the engine does, and also looks at the raw headers, because
// archive/tar accepts some that other programs read differently.
type tarCheck struct {
	in       io.Reader
	archive  *tar.Reader // reads from the tarCheck
	headers  []byte      // raw: what archive has read for the last entry: padding, extended headers, header
	inHeader bool
	offset   int64 // of the stream, where archive reads next
	entries  int
	// At the top of the archive: oci-layout; manifest.json; and blobs, or the layer.tar of some directory.
	layout, manifest, layers bool
}

// Read is the input of archive. It keeps the raw headers.
func (c *tarCheck) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	c.offset += int64(n)
	if !c.inHeader {
		return n, err
	}
	c.headers = append(c.headers, p[:n]...)
	if len(c.headers) > maxHeaders {
		return 0, errors.New("an entry has more than 4 MiB of headers")
	}
	return n, err
}

// headerOrder matches the types of an entry's headers: its own, after either POSIX's extended header (x) or
// GNU's long name and link (L, K); or a global header (g) alone. If there are two x, or a g after an x,
// programs differ on which one counts.
var headerOrder = regexp.MustCompile(`^(g|(x|LK?|KL?)?[^gxLK])$`)

// next skips to the next entry and returns its header, or io.EOF at the archive's end marker.
func (c *tarCheck) next() (*tar.Header, error) {
	if _, err := io.Copy(io.Discard, c.archive); err != nil { // the content of the previous entry
		return nil, err
	}
	padding := int(-c.offset & 511)
	c.headers, c.inHeader = c.headers[:0], true
	header, err := c.archive.Next()
	c.inHeader = false
	raw := c.headers[min(padding, len(c.headers)):]
	types, last := scanHeaders(raw)
	switch {
	case strings.HasSuffix(types, "S") && header == nil: // archive/tar cannot read every sparse file
		name, _, _ := strings.Cut(string(last[:100]), "\x00")
		return &tar.Header{Name: name, Typeflag: tar.TypeGNUSparse}, nil
	case err == io.EOF && !bytes.Equal(raw, make([]byte, 1024)): // archive/tar also ends without a marker
		return nil, io.ErrUnexpectedEOF
	case err != nil:
		return nil, err
	case !headerOrder.MatchString(types):
		return nil, newAPIError(kindArchiveRefused,
			"entry %q: tar programs differ on how to read its headers", header.Name)
	}
	return header, nil
}

// plainSize matches the size in a header, octal or base-256. archive/tar ignores NULs in front of the digits;
// for GNU tar they end the number.
var plainSize = regexp.MustCompile(`^(?s: *[0-7]+([ \x00].*)?|[ \x00]*|[^\x00-\x7f].*)$`)

// scanHeaders returns the types of raw headers, up to the first that is an entry's own, and that header. A
// header that programs read differently has the type "?g", which headerOrder does not match.
func scanHeaders(raw []byte) (types string, last []byte) {
	for len(raw) >= 512 {
		last = raw[:512]
		number, kind := string(last[124:136]), string(last[156:157])
		// Go before 1.8 wrote a prefix where GNU's format has times, and archive/tar still reads one there.
		isGNU, times := string(last[257:263]) == "ustar ", strings.Trim(string(last[345:369]), "01234567\x00")
		if !plainSize.MatchString(number) || isGNU && times != "" {
			return types + "?g", last
		}
		types += kind
		size, err := strconv.ParseInt(strings.Trim(number, " \x00"), 8, 32)
		if !strings.Contains("gxLK", kind) || err != nil {
			break
		}
		raw = raw[min(len(raw), 512+int(size+511)&^511):]
	}
	return types, last
}

// entry returns an error for an entry that an image must not have, or one too many.
func (c *tarCheck) entry(h *tar.Header) error {
	if err := checkEntry(h); err != nil || h.Typeflag == tar.TypeXGlobalHeader {
		return err
	}
	if c.entries++; c.entries > maxImageEntries {
		return fmt.Errorf("the archive has more than %d entries", maxImageEntries)
	}
	name, isFile := path.Clean("/"+h.Name), h.Typeflag == tar.TypeReg
	c.layout = c.layout || name == "/oci-layout" && isFile
	c.manifest = c.manifest || name == "/manifest.json" && isFile
	c.layers = c.layers || strings.HasPrefix(name+"/", "/blobs/") ||
		path.Base(name) == "layer.tar" && strings.Count(name, "/") == 2
	if c.layout || c.manifest && c.layers {
		return errors.New("this is a saved image and not a root file system: load it into an engine, " +
			"and upload what docker export writes of a container")
	}
	return nil
}

// end returns an error if anything but padding follows the end marker: the engine stores it, and other
// programs may find another archive there.
func (c *tarCheck) end() error {
	if c.entries == 0 {
		return newAPIError(kindArchiveRefused, "the body is not a tar archive: it has no entry")
	}
	rest, err := io.ReadAll(io.LimitReader(c.in, maxPadding+1))
	if err == nil && (len(rest) > maxPadding || len(bytes.Trim(rest, "\x00")) > 0) {
		err = errors.New("something follows its end marker")
	}
	return tarError(err)
}

// onlyDigits matches a size in an extended header. archive/tar accepts a sign too.
var onlyDigits = regexp.MustCompile(`^[0-9]+$`)

// checkEntry returns an error for an entry that an image cannot have, that tar programs read differently, or
// that expands: the engine writes a sparse file of a few bytes with as many zeros as it claims.
func checkEntry(h *tar.Header) error {
	for record, value := range h.PAXRecords {
		switch {
		case strings.HasPrefix(record, "GNU.sparse"), record == "SCHILY.realsize":
			return errSparse
		case h.Typeflag == tar.TypeXGlobalHeader && record != "comment": // git archive writes one
			return errors.New("some programs apply a global header to all entries, others to none")
		case record == "size" && !onlyDigits.MatchString(value):
			return errors.New("its size is not a plain number")
		case (record == "path" || record == "linkpath") && value == "":
			return errors.New("its extended header has an empty name")
		}
	}
	switch h.Typeflag {
	case tar.TypeGNUSparse:
		return errSparse
	case tar.TypeReg:
		if strings.HasSuffix(h.Name, "/") {
			return errors.New("it is a file, but its name ends in a slash")
		}
		return nil
	case tar.TypeDir, tar.TypeSymlink, tar.TypeLink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo,
		tar.TypeXGlobalHeader:
		if h.Size != 0 { // programs differ on whether content follows
			return errors.New("only a file can have a size")
		}
		return nil
	}
	return errors.New("it is not a file, directory, link, device or FIFO")
}

var errSparse = errors.New("it is a sparse file: write the archive without --sparse")
